"""The pages: views of tables as HTML."""
