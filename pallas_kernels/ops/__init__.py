"""Operations on packed arrays: one folder each, with its meaning, its primitive and a file for each backend."""
