"""From a data file to conversations and rendered text. No model, tokenizer or torch is needed here."""
