"""How far the predictions of each method are from stock's, position by position."""
