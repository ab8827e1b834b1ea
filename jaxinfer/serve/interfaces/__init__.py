"""What requests and answers of other APIs look like, as plain values of JSON; no HTTP."""
