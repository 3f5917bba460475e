"""Files of the Hugging Face hub, through `huggingface_hub`."""
