"""Seven tensor functions as maps from cells to cells, views as strides, and the routing code that is made of them."""
