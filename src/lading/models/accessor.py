"""Access to the hub of a family, which is imported with torch when it is first called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, final

from lading.catalog.store import get_asset_store
from lading.errors import InternalError
from lading.models.family import ModelConfigT, ModelT, find_class, get_family
from lading.system.needs import needs_torch

if TYPE_CHECKING:
    from lading.models.hub import ModelHub


@final
class ModelHubAccessor(Generic[ModelT, ModelConfigT]):
    """A callable that returns the typed hub of a family; one line in the module of each family.

    .. code:: python

        get_qwen_model_hub = ModelHubAccessor("qwen", Qwen, QwenConfig)

        model = get_qwen_model_hub().load_model("qwen3_0.6b")
    """

    def __init__(self, family_name: str, kls: type[ModelT] | str, config_kls: type[ModelConfigT]) -> None:
        """Make an accessor.

        :param kls: the class of the models, or its place as :class:`Family` takes it.
        """
        self._family_name = family_name
        self._kls = kls
        self._config_kls = config_kls

    def __call__(self) -> ModelHub[ModelT, ModelConfigT]:
        """Return the hub over the default store.

        :raises ModelFamilyNotKnownError: no installed package registers the family.
        :raises InternalError: the family has other classes than the accessor.
        """
        with needs_torch(f"The hub of the {self._family_name} family"):
            from lading.models.hub import ModelHub

        family = get_family(self._family_name)
        kls = find_class(self._kls, family.name)

        for what, expected, found in (
            ("models", kls, family.model_kls),
            ("configurations", self._config_kls, family.config_kls),
        ):
            if not issubclass(found, expected):
                raise InternalError(
                    f"The {what} of the {family.name} family are expected to be of type {expected.__name__}, but are "
                    f"of type {found.__name__}."
                )

        return ModelHub(family, get_asset_store())
