"""The only room that knows tags, chat templates and tokenizers: problems in, token ids with known spans out."""
