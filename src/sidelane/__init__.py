"""sidelane: move tensors over narrow wires by making them smaller on the way."""
