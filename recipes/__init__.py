"""Research code: how what the package ships was made. Not in the wheel."""
