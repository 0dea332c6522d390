raise SystemExit('code that came with the weights has run')
