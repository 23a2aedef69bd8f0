"""Any replica of an MCP server serves any session."""
