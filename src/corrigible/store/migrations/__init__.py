"""The store's schema, one numbered revision after the other (Alembic), shipped inside the wheel.

``Store.open`` runs whatever is missing, in one transaction. To add a revision: change
``store/schema.py``, write ``versions/NNNN_what.py`` after the newest one, set ``schema.HEAD``; a test
compares the migrated database with the metadata on both databases.
"""
