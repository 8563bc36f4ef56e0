"""What a run costs: counted (`flops`), measured (`meter`), and on what (`environment`)."""
