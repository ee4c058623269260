"""Records as a document: numbers -> sections of tables and plots -> Markdown, figures, one page."""
