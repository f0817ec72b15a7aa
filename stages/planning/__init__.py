"""What `plan` is made of: bytes and seconds of a trial, and the screen that shows them."""
