"""Everything that is displayed: events and examples as text, HTML, figures and widgets. Never imports train."""
