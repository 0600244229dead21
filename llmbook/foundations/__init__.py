"""From token ids to gradients."""
