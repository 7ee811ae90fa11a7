"""How far a step goes along its gradient, where that is measured."""
