"""Process-wide concerns: turn-taking between threads, user functions, signals, and saving at exit."""
