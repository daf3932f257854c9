"""What all steps share: inputs, stock-taking, commit."""
