"""The client side: local training, defenses, and the witness of simulations. No attack is imported here."""
