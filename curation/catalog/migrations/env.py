"""Runs the migrations in the transaction that `curation.catalog.database` has opened; nothing else runs them."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
