"""The data check: what is wrong or odd with rows, before anything is trained."""
