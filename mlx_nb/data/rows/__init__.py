"""Rows: recognized by their columns, in the vocabularies of many tools, or refused in one line."""
