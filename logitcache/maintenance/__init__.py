"""Living with a cache, without the teacher."""
