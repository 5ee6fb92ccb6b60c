"""What runs came to: tables of figures over seeds (:mod:`.table`), and pages about runs (:mod:`.report`)."""
