"""The web page for a trained model: chat, generate, edit and reconstruct in a browser (needs Gradio)."""
