"""What every application of the shop does when it starts."""

from __future__ import annotations

from dependency_injector import providers
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from shop import checkout, services
from shop.container import container


class ShopSettings(BaseSettings):
    """The shop's own settings: SHOP_BROKER and SHOP_PORT, from the environment or from .env. app_db has its own beside them."""

    model_config = SettingsConfigDict(env_prefix="SHOP_", env_file=".env", extra="ignore")

    broker: str = ""
    """The URL of Celery's broker. Without one, the application sends the letters itself."""
    port: int = Field(default=8000, ge=1, le=65535)


def open_shop() -> None:
    """Wire the services, make the tables that are missing, and find out how letters are sent."""
    container.wire(modules=[services, checkout])
    container.create_all()  # for the example: migrations do it in earnest, before the application starts
    if ShopSettings().broker and not container.post.overridden:
        from shop.tasks import send_letter

        container.post.override(providers.Object(send_letter.delay))
