from corrigible.cli import main

main()
