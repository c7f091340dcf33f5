"""All use of other libraries, one module or package for each; no other part of loraga imports these libraries."""
