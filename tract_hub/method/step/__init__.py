"""One gradient over all processes and all backwards of a step: ``scope="global"``."""
