"""What a model says in a reply: thoughts, text for the user, and calls of tools, told apart while the reply grows."""
