"""Variants of DARTS, one file each.

A method fills at most seven slots, each with DARTS' own default: relaxation and mixed operation
(of `Supernet`), hypergradient, alpha optimizer, penalty, selection and stages (of `SearchModule`).
"""
