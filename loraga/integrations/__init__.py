"""Rooms that know other libraries; nothing else in loraga imports them."""
