module heliograph/peers/legacy/go

go 1.21
