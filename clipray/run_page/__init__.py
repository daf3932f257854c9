"""One page of HTML that shows what a run wrote: read from its tables, in bounded memory, and of bounded size."""
