from realm_jax.cli import main

main()
