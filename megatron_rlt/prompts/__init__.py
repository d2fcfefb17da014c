"""Tags, chat templates and tokenizers: turns problems into token ids with known spans."""
