"""Measurements that print their figures; a comparison runs both sides in turns."""
