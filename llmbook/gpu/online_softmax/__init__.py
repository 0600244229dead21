"""Softmax over a stream: the running state (m, l, o), its merge, and what each way of computing a softmax moves."""
