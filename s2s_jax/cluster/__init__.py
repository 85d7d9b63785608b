"""Devices, and the hosts of a job."""
