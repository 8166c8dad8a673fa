"""Operations on models, plans in and plans out: initialise, graft, exchange layers, cast, scale, pad."""
