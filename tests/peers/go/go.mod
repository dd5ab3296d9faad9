module heliograph/tests/peers/go

go 1.24
