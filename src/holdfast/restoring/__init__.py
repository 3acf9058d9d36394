"""Floor 3, upwards: plan -> read -> verify -> place. Nothing live is touched before every byte has been verified."""
