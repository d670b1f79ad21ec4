"""Group norm, instance norm and layer norm over channels."""
