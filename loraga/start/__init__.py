"""The start of an adapter: factors of a gradient become A and B. Nothing here knows of models or of PEFT."""
