"""Byte codecs and the packet: everything between codes in memory and bytes on a wire."""
