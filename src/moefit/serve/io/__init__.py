"""Bringing experts into slots: reading, pending loads, copies to a device."""
