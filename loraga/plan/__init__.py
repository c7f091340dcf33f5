"""What an initialisation will need, counted on shapes without weights."""
