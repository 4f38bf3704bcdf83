"""The dial: one engine that holds theta and v, and answers any alpha, per request.

For every linear layer (theta + alpha v) x = theta x + alpha (v x). `installing` puts v beside each
module, `layers` adds its part, `turns` knows which token has which alpha, `runner` and `worker`
tell it from vLLM's batch, `scheduler` keeps the prefix cache of each alpha apart, `admission` and
`middleware` read what requests ask for.
"""
