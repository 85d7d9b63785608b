"""Answers requests over HTTP from an export; needs the packages of the extra `server`."""
