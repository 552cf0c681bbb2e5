"""The live panel of a run: one widget, whose browser part is in `page/`."""
