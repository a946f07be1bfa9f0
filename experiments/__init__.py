"""Campaigns: the whole road from a configuration to a report, on any engine, and the recipes of tables and figures."""
