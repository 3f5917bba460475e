"""The catalog: a database of families, architectures, cards, checkpoints and their tensors.

:mod:`~lading.catalog.store` answers, :mod:`~lading.catalog.import_cards` takes in, :mod:`~lading.catalog.query` lets
anyone ask in SQL, and :mod:`~lading.catalog.doors` does the latter two over the default catalog. All of them work on a
:class:`~lading.catalog.database.database.Database`, which is opened, made and brought up to date as need be. Rows
(:mod:`~lading.catalog.schema`) stay in this package; what leaves it are the values of :mod:`~lading.catalog.records`.

Below these doors: ``engine`` opens connections and tells their failures, ``lifecycle`` moves the schema between
versions, ``refresh`` takes up what is new in the package and in the user's card files, ``merge`` decides what card
files change, ``apply`` and ``rows`` write it, ``resolved`` keeps what cards resolve to, ``search`` finds words in that,
``manifests`` holds tensors in columns.
"""
